"""Evaluations: a file per question that is asked of a model or a method.

Of a model:

- `captions`: are its captions of Shapes true, and what do they hallucinate?
- `vqa`: are its answers right, and where does its relevance lie?
- `finetuning`: does fine-tuning make captioners hallucinate less?

Of methods that explain:

- `perturbation`: which one finds the tokens that CLIPmapper needs?
- `sanity`: do its maps rest on what CLIPmapper has learnt?
- `localisation`: does its relevance lie on the object that a text is about?
- `caption_explanations`: which one explains the words of captions? (`explained_words` is the
  device's part, `caption_explanation_tables` shows the result, and `detector` keeps what tells
  hallucinated words.)
- `weighting`: which rule of weighted accumulation is best? (Its docstring has the study's plan.)
- `methods`: all of them in one table, with what they cost. (`flops` counts operations.)

Beside them stand what they are judged on (`captioned_images`, `mapper_examples`, `pair_examples`,
`located_examples`), and how a result is shown and kept (`tables`, `record`).
"""
