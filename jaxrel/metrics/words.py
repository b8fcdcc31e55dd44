"""Words that the metrics of captions ask about, and what a word is the plural of.

The lists are those of Sun et al. 2022, "Explain and improve: LRP-inference fine-tuning for image
captioning models".
"""

from collections.abc import Collection

# Words that captions of Flickr30K and of COCO often have.
FLICKR30K_FREQUENT: tuple[str, ...] = tuple(
    "dogs building person background field women hat ball children child water street boy dog "
    "girl men shirt people woman man".split()
)
COCO_FREQUENT: tuple[str, ...] = tuple(
    "clock kitchen picture water food pizza grass building bus sign bathroom baseball dog room "
    "cat plate train field tennis person table street woman people man".split()
)

# Words that name an object: those of COCO's categories, and others for the same things.
OBJECTS: frozenset[str] = frozenset(
    "airplane apple baby backpack ball banana bat bear bed bench bicycle bike bird blender boat "
    "book bottle bowl boy broccoli brush bus cake car carrot cat chair clock couch cow cup desk "
    "dog donut door drier elephant fork frisbee giraffe girl glass glove handbag hat horse "
    "hydrant jet jetliner keyboard kite knife laptop light man men meter microwave mirror "
    "motorcycle mouse orange oven people person phone pizza plane plant plate player racket "
    "refrigerator remote sandwich scissors sheep shoe sign sink skateboard skis snowboard spoon "
    "suitcase surfboard table taxi tie toaster toilet toothbrush train truck tv umbrella vase "
    "window woman women zebra".split()
)

# NLTK's English list of 179 words.
STOP_WORDS: frozenset[str] = frozenset(
    "i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself "
    "yourselves he him his himself she she's her hers herself it it's its itself they them their "
    "theirs themselves what which who whom this that that'll these those am is are was were be "
    "been being have has had having do does did doing a an the and but if or because as until "
    "while of at by for with about against between into through during before after above below "
    "to from up down in out on off over under again further then once here there when where why "
    "how all any both each few more most other some such no nor not only own same so than too "
    "very s t can will just don don't should should've now d ll m o re ve y ain aren aren't "
    "couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn isn't "
    "ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't "
    "weren weren't won won't wouldn wouldn't".split()
)


def singulars(word: str) -> tuple[str, ...]:
    """The word, and what it may be the plural of, by its ending.

    Endings are taken as a whole. The reference implementation strips sets of characters, which
    makes "gla" of "glass" and never finds "bus" in "buses". Plurals without an ending ("men",
    "mice") are words of their own.

    Args:
      word: in lower case.

    Returns:
      The word first. Not all of the others need be words: look for them in a list.
    """
    if not word.endswith("s") or word.endswith("ss"):
        return (word,)
    forms = [word, word[:-1]]
    stem = word[:-2]
    if word.endswith("es") and stem.endswith(("s", "x", "z", "ch", "sh", "o")):
        forms.append(stem)
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("ves"):
        forms += [word[:-3] + "f", word[:-3] + "fe"]
    return tuple(form for form in forms if form)


def match(word: str, names: Collection[str]) -> str | None:
    """The name that a word of a caption stands for.

    The word itself, else its singular, else the only name of several words of which either is
    one ("ball" stands for "sports ball"). A part that several names have, as "baseball" in
    "baseball bat" and "baseball glove", stands for none.

    Args:
      word: in lower case.
      names: such as `OBJECTS`, or the categories that are in an image.

    Returns:
      One of the names, or None.

    Raises:
      ValueError: text in place of a collection.
    """
    if isinstance(names, str):
        raise ValueError(
            f"match: the names are the text {names!r}; expected a set or list of names"
        )
    forms = singulars(word)
    for form in forms:
        if form in names:
            return form
    found = {name for name in names if not set(forms).isdisjoint(name.split())}
    return found.pop() if len(found) == 1 else None
