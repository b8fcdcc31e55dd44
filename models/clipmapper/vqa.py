"""CLIPmapper that answers questions about images."""

import operator
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrel import contrast
from jaxrel.models.clip.tokens import end_of_text, token_ids
from jaxrel.models.clipmapper.model import KINDS, CLIPMapper
from jaxrel.models.display import without_spelling
from jaxrel.models.inputs import Inputs, as_pairs, by_example
from jaxrel.models.transformer import read_at

_ADVICE = "as many images as questions, one image, or one question"


class CLIPMapperVQA(CLIPMapper):
    """CLIPmapper that answers questions: one of a list of answers, read at the end token."""

    task = "vqa"

    def __call__(self, inputs: Inputs, *, return_attention: bool = False) -> Any:
        """Return the answers' logits.

        Args:
          inputs: images and questions, one question per image.
          return_attention: also return the attention maps.

        Returns:
          float32 [batch, answers]; with `return_attention` a pair of it and the maps by name,
          [layers, batch, heads, query, key].

        Raises:
          ValueError, TypeError: an input is missing or has a wrong shape or dtype.
        """
        words, maps = self._features(inputs, return_attention)
        text = jnp.asarray(inputs["text"])
        logits = self.answer_logits(words, text)
        return (logits, maps) if return_attention else logits

    def answer_logits(
        self, words: Float[Array, "batch words mapped"], text: Int[Array, "batch words"]
    ) -> Float[Array, "batch answers"]:
        """Return the answers' logits from what `map` returns."""
        return self.head(self.at_end(words, text)).astype(jnp.float32)

    def at_end(
        self, words: Float[Array, "batch words mapped"], text: Int[Array, "batch words"]
    ) -> Float[Array, "batch mapped"]:
        """Return the target token, from which the answer is read: the question's end."""
        return read_at(words, end_of_text(text, self.config.clip.text.eos_token_id))

    def predict(self, inputs: Inputs) -> Float[Array, "batch answers"]:
        """Return each answer's probability."""
        logits = self(inputs)
        return jax.nn.sigmoid(logits) if self.config.several else jax.nn.softmax(logits)

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the logit of one answer per question: the scalar that explanations explain.

        Args:
          inputs: images and questions; "answer" int [batch], if there, is the target, and
            "against" bool [batch, answers] those it is contrasted with.
          target: the answer's index, one or one per question; None: those of the inputs, or
            else the most probable.
        """
        target = inputs.get("answer") if target is None else target
        logits = self(inputs)
        # An index has no gradient: the choice of the answer is not explained, its logit is.
        chosen = logits.argmax(-1) if target is None else jnp.asarray(target)
        if "against" in inputs:
            return contrast(logits, chosen, inputs["against"])
        return read_at(logits, chosen)

    def contrasted(self, inputs: Inputs, against: Any) -> dict[str, Array | np.ndarray]:
        """Return rows whose score is their answer's logit less that of others: see `score`.

        Args:
          inputs: rows, as `pairs` returns them.
          against: another answer, in words or as an index, a tuple of them, or "*" for all others;
            or a list with one of these for each row.

        Raises:
          ValueError: other numbers, an answer that the model does not have, or a row's own answer.
        """
        answer = np.asarray(inputs["answer"])
        each = against if isinstance(against, list) else [against] * len(answer)
        if len(each) != len(answer):
            raise ValueError(f"against: {len(each)} for {len(answer)} rows; give one for each")
        mask = np.zeros((len(answer), len(self.config.answers)), bool)
        for row, own, others in zip(mask, answer, each, strict=True):
            if isinstance(others, str) and others == "*":
                row[:] = True
                row[own] = False
                continue
            row[[self._answer(x) for x in (others if isinstance(others, tuple) else (others,))]] = 1
            if row[own]:
                raise ValueError(
                    f"against: the answer {self.config.answers[own]!r} is explained, and cannot be "
                    "contrasted with itself; leave it out, or name another target"
                )
        return {**inputs, "against": jnp.asarray(mask)}

    def prepare(self, *, image: Any = None, text: Any = None) -> dict[str, Array]:
        """Make inputs from images and questions, with the model's own preprocessing.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them.
          text: a question or a list of questions.

        Raises:
          TypeError, ValueError: see `CLIP.prepare`.
        """
        sizes = self.config.clip
        ids = token_ids(self.processor, text, sizes.text)
        pixels = jnp.asarray(self.processor.image(image, side=sizes.vision.sides))
        spelling = self.processor.spelling(text, sizes.text.context, known=True)
        return {"image": pixels, "text": ids, **spelling}

    def pairs(self, inputs: Inputs, target: Any = None) -> dict[str, Array]:
        """Bring inputs to one image, question and answer per row.

        Args:
          inputs: images and questions.
          target: the answer to explain, in words or as an index, one or one per question; the
            most probable by default.

        Raises:
          ValueError: the numbers do not fit, or the model does not have this answer.
        """
        paired = as_pairs(inputs, "questions", _ADVICE)
        rows = len(paired["text"])
        if target is None:
            answer = _predict(self, without_spelling(paired)).argmax(-1)
        else:
            answer = jnp.asarray(self._answers(target, rows))
        return paired | {"answer": answer.astype(jnp.int32)}

    def examples(self, *, image: Any, text: Any, target: Any = None) -> dict[str, Any]:
        """Return images, questions and answers as lists with an entry per question.

        Args:
          image: as in `prepare`.
          text: as in `prepare`.
          target: as in `pairs`.

        Raises:
          ValueError: see `pairs`.
        """
        lists: dict[str, Any] = by_example(image, text, "questions", _ADVICE)
        answers = None if target is None else self._answers(target, len(lists["text"]))
        return lists | {"target": answers}

    def _answers(self, target: Any, rows: int) -> list[int]:
        """The indices of one answer per question."""
        chosen = [self._answer(one) for one in ([target] if np.ndim(target) == 0 else target)]
        if len(chosen) not in (1, rows):
            raise ValueError(f"{len(chosen)} answers for {rows} questions; give one for each")
        return chosen * rows if len(chosen) == 1 else chosen

    def _answer(self, answer: Any) -> int:
        answers = self.config.answers
        if isinstance(answer, str) and answer in answers:
            return answers.index(answer)
        if hasattr(answer, "__index__") and operator.index(answer) in range(len(answers)):
            return operator.index(answer)
        shown = ", ".join(answers[:30]) + (", ..." if len(answers) > 30 else "")
        raise ValueError(
            f"this model has no answer {answer!r}; it has {len(answers)} answers: {shown}"
        )

    def describe(self, inputs: Inputs) -> list[str]:
        """Return each row's answer, with its probability."""
        answer = np.asarray(inputs["answer"])
        left_out = ("answer", "against")
        asked = without_spelling({n: x for n, x in inputs.items() if n not in left_out})
        probability = np.asarray(_predict(self, asked))[np.arange(len(answer)), answer]
        named = [self.config.answers[i] for i in answer]
        return [f"{name} ({p:.0%})" for name, p in zip(named, probability, strict=True)]

    def target_tokens(self, inputs: Inputs) -> dict[str, Int[Array, " batch"]]:
        """Return the token from which the answer is read: the question's end."""
        end = end_of_text(inputs["text"], self.config.clip.text.eos_token_id)
        return {"text": end}


KINDS["vqa"] = CLIPMapperVQA


@jax.jit
def _predict(model: CLIPMapperVQA, inputs: Any) -> Array:
    return model.predict(inputs)
