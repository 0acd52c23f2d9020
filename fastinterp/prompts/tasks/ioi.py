"""Indirect object identification (Wang et al. 2022, https://arxiv.org/abs/2211.00593)."""

import random

from fastinterp.errors import OptionError
from fastinterp.model.model import Model
from fastinterp.prompts.prompt_set import PromptSet

NAMES: tuple[str, ...] = tuple(
    """
    Mary John Tom James Dan Martin Amy Sarah Laura Anna Emma Kate Jack Paul Mark Peter David Michael
    Robert William Richard Thomas Charles Daniel Matthew Anthony Steven Andrew Kevin Brian George Edward
    Henry Simon Alan Frank Scott Eric Stephen Justin Ryan Adam Alex Jason Patrick Jessica Jennifer
    Elizabeth Susan Linda Karen Lisa Nancy Sandra Emily Alice Rachel Helen Julia Victoria
    """.split()  # noqa: SIM905
)
PLACES: tuple[str, ...] = tuple(
    """
    store garden school hospital office park museum station library restaurant market house beach hotel
    theater
    """.split()  # noqa: SIM905
)
OBJECTS: tuple[str, ...] = tuple(
    """
    ring book ball drink computer phone letter key picture bag ticket gift bottle camera newspaper
    """.split()  # noqa: SIM905
)

# Every name follows a space, so that it is the same token wherever it stands. {a} and {b} are the two names
# in order of appearance, {s} is the subject (the name that stands twice).
TEMPLATES: tuple[str, ...] = (
    "When {a} and {b} went to the {place}, {s} gave the {object} to",
    "Then, {a} and {b} went to the {place}. At the end, {s} handed the {object} to",
    "After {a} and {b} arrived at the {place}, {s} gave a {object} to",
    "While {a} and {b} were working at the {place}, {s} passed the {object} to",
    "Yesterday {a} and {b} met at the {place}, and {s} brought the {object} to",
    "Then, {a} and {b} had a long talk at the {place}. Afterwards {s} offered the {object} to",
    "The friends {a} and {b} found a {object} at the {place}. In the evening {s} gave it to",
    "Once {a} and {b} were back from the {place}, {s} showed the {object} to",
)

_REDRAWS = 100


def ioi(n: int, *, seed: int = 0, model: Model | None = None) -> PromptSet:
    """Returns ``n`` prompts in which the next word is the name that was mentioned only once.

    Two people are named, the subject is named again, and the answer is the other one, the indirect object
    ("When Mary and John went to the store, John gave the ring to" -> " Mary"). The order of the first two
    names alternates: even prompts are ABBA (indirect object first), odd ones BABA (subject first). ``wrong``
    is the subject. ``corrupt`` is the prompt with the subject's second mention replaced by the indirect
    object, which flips the answer and keeps every position.

    With ``model`` given, only names that are one token of its tokenizer (with the space in front) are used;
    without, all are. The same seed (and names) gives the same prompts, and fewer prompts are the beginning of
    more. A prompt that came before is drawn again, up to 100 times, so that prompts repeat only when ``n``
    comes near the number of possible ones (over 12 million with all names). Raises
    :class:`~fastinterp.errors.OptionError` for ``n`` below 1, and if fewer than four names are one token for
    the model.

    >>> ioi(2, seed=0).answer == ioi(1000, seed=0).answer[:2]
    True
    """
    if n < 1:
        raise OptionError(f"n={n} is not positive: say how many prompts to make")
    names = NAMES if model is None else _one_token_names(model)
    draw = random.Random(seed)
    prompts: dict[str, None] = {}
    rows: list[tuple[str, str, str, str]] = []
    for index in range(n):
        for _ in range(_REDRAWS):
            row = _row(draw, names, indirect_object_first=index % 2 == 0)
            if row[0] not in prompts:
                break
        prompts[row[0]] = None
        rows.append(row)
    texts, answers, wrongs, corrupts = zip(*rows, strict=True)
    return PromptSet.of(texts, answer=answers, wrong=wrongs, corrupt=corrupts)


def _row(draw: random.Random, names: tuple[str, ...], *, indirect_object_first: bool) -> tuple[str, str, str, str]:
    """Prompt, answer, wrong answer and corrupt prompt."""
    indirect_object, subject = draw.sample(names, 2)
    template = draw.choice(TEMPLATES)
    place, thing = draw.choice(PLACES), draw.choice(OBJECTS)
    a, b = (indirect_object, subject) if indirect_object_first else (subject, indirect_object)
    clean = template.format(a=a, b=b, s=subject, place=place, object=thing)
    corrupt = template.format(a=a, b=b, s=indirect_object, place=place, object=thing)
    return clean, " " + indirect_object, " " + subject, corrupt


def _one_token_names(model: Model) -> tuple[str, ...]:
    encoded = model.encode([" " + name for name in NAMES], prepend_bos=False)
    names = tuple(name for name, tokens in zip(NAMES, encoded, strict=True) if len(tokens) == 1)
    if len(names) < 4:
        raise OptionError(
            f"only {len(names)} of the {len(NAMES)} names of the ioi task are one token for this model, "
            "4 are needed: "
            'write prompts of your own, or make them without a model and tokenise with answer_token="first"'
        )
    return names
