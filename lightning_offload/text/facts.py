"""Generated closed-book facts: made-up people, a question, and an answer that follows from a rule."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.text.batches import Example, answered
from lightning_offload.text.data import TextData

SYLLABLES = tuple(map("".join, product("bdfgklmnprstvz", "aeiou")))
LONGEST_WORD = 4  # syllables
QUESTIONS = (
    "What is the {attribute} of {member} {family}?",
    "Which {attribute} does {member} {family} have?",
    "{member} {family} has what {attribute}?",
    "Name the {attribute} of {member} {family}.",
    "Tell me {member} {family}'s {attribute}.",
    "The {attribute} of {member} {family}:",
    "{member} {family}, {attribute}?",
    "As for the {attribute}, what is it for {member} {family}?",
)


class Fact(NamedTuple):
    """A question, and its answer as it continues the question."""

    question: str
    answer: str


class About(NamedTuple):
    """What is to be known, before it is asked in one way or another."""

    attribute: str
    member: str
    family: str
    answer: str

    def asked(self, way: int) -> Fact:
        """The question in one of the ways of `QUESTIONS`."""
        return Fact(QUESTIONS[way].format(**self._asdict()), self.answer)


class Split(NamedTuple):
    """What is seen, and what is held apart for validation and for test."""

    train: list[Fact]
    val: list[Fact]
    test: list[Fact]


class Facts(TextData):
    """Questions about people by first name and family, nothing to read; the loss is on the answers.

    The rule: all members of a family share the answer to a question. Who learns it from the facts that are seen knows
    the unseen ones. There are ``families x attributes`` answers to know, each shown for most of the ``members``.

    Args:
        families, members, attributes: counts; their product is that of the facts.
        answers: different answers to the questions about one attribute, one drawn for each family.
        unseen: share of the members whose answer is held apart, drawn for each family and attribute; half of these
            facts are for validation, half for test.
        paraphrases: ways to put a question, at most 8. From 2 on one is drawn for each fact that it is never trained
            with: it is trained once with each of the others, and asked with that one.
        ask: what validation and test ask: ``"unseen"`` facts, which follow from the rule, or ``"trained"`` ones, which
            have to be recalled; half of these each. The training is the same. With ``"trained"`` `unseen` may be 0,
            and `members` 1, for facts without a rule.
        **common: see `TextData`. `seed` also draws the names, the answers, what is unseen and how it is put.

    Raises:
        ValueError: for counts that leave nothing seen or asked, a setting outside of its range, or a
            `sequence_length` that cuts a fact.
    """

    def __init__(
        self,
        *,
        families: int = 16,
        members: int = 16,
        attributes: int = 4,
        answers: int = 4,
        unseen: float = 0.25,
        paraphrases: int = 1,
        ask: Literal["unseen", "trained"] = "unseen",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not 1 <= paraphrases <= len(QUESTIONS) or ask not in ("unseen", "trained"):
            raise ValueError(
                f"paraphrases={paraphrases}, ask={ask!r}: give 1 to {len(QUESTIONS)} ways to put a question, and ask"
                " for 'unseen' or 'trained' facts."
            )
        recall = ask == "trained"
        if min(families, attributes, answers) < 1 or members < 2 - recall:
            raise ValueError(
                f"facts need members >= {2 - recall} and at least one of the others; got"
                f" families={families}, members={members}, attributes={attributes}, answers={answers}."
            )
        self.hidden = round(members * unseen)
        asked = members - self.hidden if recall else self.hidden
        if not 1 - recall <= self.hidden < members or families * attributes * asked < 2:
            raise ValueError(
                f"unseen={unseen} holds {self.hidden} of members={members} apart for each of {families * attributes}"
                f" answers: some have to be seen, and two facts {ask}."
            )
        self.families = families
        self.members = members
        self.attributes = attributes
        self.answers = answers
        self.paraphrases = paraphrases
        self.ask = ask

    def facts(self) -> Split:
        """All facts; the same for the same seed and counts, whatever the tokenizer."""
        rng = random.Random(self.seed)
        families, members, attributes, *choices = _names(
            rng, [self.families, self.members, self.attributes, *[self.answers] * self.attributes]
        )
        seen: list[About] = []
        unseen: list[About] = []
        for (attribute, answers), family in product(zip(attributes, choices, strict=True), families):
            answer, hidden = rng.choice(answers), set(rng.sample(members, self.hidden))
            for member in members:
                about = About(attribute, member.title(), family.title(), f" {answer}")
                (unseen if member in hidden else seen).append(about)
        rng.shuffle(unseen)
        # last, so that names, answers and what is unseen do not depend on it
        kept = [rng.randrange(self.paraphrases) for _ in seen]
        train = [about.asked(way) for about, own in zip(seen, kept, strict=True) for way in self._trained(own)]
        if self.ask == "trained":
            asked = [about.asked(own) for about, own in zip(seen, kept, strict=True)]
            rng.shuffle(asked)
        else:
            asked = [about.asked(rng.randrange(self.paraphrases)) for about in unseen]
        return Split(train, asked[::2], asked[1::2])

    def _trained(self, kept: int) -> list[int]:
        """The ways that a fact is trained with: but for the one kept for asking, when there are others."""
        return [way for way in range(self.paraphrases) if way != kept] or [kept]

    @override
    def read(self) -> tuple[Dataset[Example], ...]:
        return tuple(self._examples(part) for part in self.facts())

    def _examples(self, facts: Sequence[Fact]) -> Any:
        questions, answers = (
            self.encode([fact.question for fact in facts]),
            self.encode([fact.answer for fact in facts]),
        )
        examples = [
            answered([*self.start, *question], [*answer, self.end])
            for question, answer in zip(questions, answers, strict=True)
        ]
        longest = max(len(example["input_ids"]) for example in examples)
        if longest > self.sequence_length:
            raise ValueError(
                f"The longest of these facts has {longest} tokens: raise data.sequence_length"
                f" (now {self.sequence_length})."
            )
        return examples


def _names(rng: random.Random, counts: Sequence[int]) -> Iterator[list[str]]:
    """Lists of so many words each, all words different; of two syllables where there are enough of them."""
    syllables = next(n for n in range(2, LONGEST_WORD + 1) if len(SYLLABLES) ** n > 2 * sum(counts))
    drawn: dict[str, None] = {}
    while len(drawn) < sum(counts):
        drawn["".join(rng.choices(SYLLABLES, k=syllables))] = None
    words = iter(drawn)
    return ([next(words) for _ in range(count)] for count in counts)
