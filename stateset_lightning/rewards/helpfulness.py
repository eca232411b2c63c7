"""A cheap reward for helpful answers in English: word statistics, no model. Good for a first run, easily outgrown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stateset_lightning.rewards.base import RewardFunction, RewardResult
from stateset_lightning.rewards.text import completion, question, repeated_share, target_texts, words
from stateset_lightning.types import Turn

MAX_WORDS = 300
"""Answers of up to this many words lose nothing for their length."""

_FUNCTION_WORDS = frozenset(
    """
    a about above after again against all also am an and any are as at be because been before being below between
    both but by can could did do does doing down during each either every few for from further had has have having
    he her here hers him his how however i if in into is it its itself just let like may me might more most much
    must my no nor not of off on once one only onto or other our out over own per same shall she should so some such
    than that the their them then there these they this those through thus to too under until up upon us very was we
    were what when where whether which while who whom whose why will with within without would yet you your tell
    explain describe give please define it's that's
    """.split()  # noqa: SIM905 (a list of strings would fill a page)
)

_STOCK_PHRASES = re.compile(
    r"\b(?:"
    + "|".join(
        [
            r"(?:that(?:'s| is) )?(?:such )?(?:an? )?(?:great|good|excellent|wonderful|fantastic|interesting) question",
            (
                r"(?:i|we)(?:'d|'m|'re| would| am| are) (?:be )?(?:more than )?(?:happy|glad|delighted|pleased|here) to"
                r" (?:help|assist|answer)"
            ),
            r"(?:thank you|thanks) (?:so much |very much )?for (?:asking|your|reaching|the question)",
            r"i hope (?:this|that|it) (?:helps|answers|is helpful|was helpful)",
            r"(?:please )?(?:let me know|feel free|do not hesitate|don't hesitate|reach out)",
            r"(?:is|if) there(?:'s| is)? anything else",
            r"if you have any (?:other|further|more|additional|questions)",
            r"as an? (?:ai|large) (?:language )?(?:model|assistant)",
            r"i(?:'m| am) (?:sorry|afraid|unable|just an? ai)",
            r"i apologi[sz]e",
            r"i (?:can't|cannot|can not|do not|don't) (?:help|assist|answer|know)",
            r"i (?:completely |fully |totally )?understand (?:your|how|that you)",
            r"(?:sure|certainly|absolutely|of course)(?: thing)?(?=[\s!,.:]|$)",
            r"it(?:'s| is) (?:important|worth|crucial) (?:to note|noting|to remember)",
            r"here(?:'s| is| are) (?:the|your|an?|my) (?:answer|explanation|overview|response)",
            r"let me (?:give|provide|share|explain|answer|break)",
        ]
    )
    + r")[^.!?,:;\n]{0,80}"  # with the rest of its clause; behind the next punctuation mark an answer may begin
)


class HelpfulnessReward(RewardFunction):
    """How helpful an answer looks, from 0 to 1, by word statistics of English text.

    The score is a product, so an answer cannot make up for one missing part by another:

        (0.3 + 0.7 relevance) * informativeness * prose * (1 - stock) * (1 - repetition) * (1 - echo) * brevity

    * relevance: content words of the question (the last user turn) that the answer takes up; half of them, at most 5,
      are enough.
    * informativeness: n / (n + 1.5), where n counts the different content words that the question does not have.
      Echoing the question or stuffing its key words into the answer gives n = 0, hence a score of 0.
    * prose: share of function words (the, of, is) against the 20 % that any English sentence reaches; a bare list of
      words fails.
    * stock: share of the answer that is stock phrases ("Great question! I'd be happy to help."). They do not count as
      information.
    * repetition: share of word trigrams that occurred before. echo: share of words copied from the question in long
      runs.
    * brevity: 1 up to 300 words, then falling, so that padding costs.

    If the scenario has a `target`, the score is 0.4 times the above plus 0.6 times agreement: the share of the target's
    content words in the answer (of the best target in a list), cut by repetition, echo and brevity alike.

    It knows nothing about the truth and can be gamed by a policy that trains on it for long: prefer a target, a
    checkable answer or a judge wherever there is one. Its arguments are those of every reward.
    """

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> RewardResult:
        asked, answer = words(question(turns)), completion(turns).casefold().replace("’", "'")
        all_words = words(answer)
        if not all_words:
            return RewardResult(0.0, {"empty": 1.0})
        said = words(_STOCK_PHRASES.sub(" ", answer))
        parts = {
            "relevance": _relevance(asked, said),
            "informativeness": _informativeness(asked, said),
            "prose": _prose(said),
            "stock": 1 - len(said) / len(all_words),
            "repetition": repeated_share(all_words, 3),
            "echo": _echo(asked, all_words),
            "brevity": min(1.0, MAX_WORDS / len(all_words)),
        }
        honest = (1 - parts["repetition"]) * (1 - parts["echo"]) * parts["brevity"]
        score = (
            (0.3 + 0.7 * parts["relevance"]) * parts["informativeness"] * parts["prose"] * (1 - parts["stock"]) * honest
        )
        if (context or {}).get("target") is not None:
            parts["agreement"] = max(
                _agreement(words(target), all_words) for target in target_texts(context, self.name)
            )
            score = 0.4 * score + 0.6 * parts["agreement"] * honest
        return RewardResult(score, parts)


def _content(tokens: Sequence[str]) -> set[str]:
    """The different content words, without a plural's `s` and cut to six letters: `explains` and `explained` are
    one.
    """
    return {_stem(token) for token in tokens if token not in _FUNCTION_WORDS and (len(token) > 1 or token.isdigit())}


def _stem(token: str) -> str:
    token = token.removesuffix("'s")
    return (token[:-1] if len(token) > 3 and token.endswith("s") and not token.endswith("ss") else token)[:6]


def _relevance(asked: Sequence[str], said: Sequence[str]) -> float:
    wanted = _content(asked)
    needed = min(5, math.ceil(len(wanted) / 2))
    return min(1.0, len(wanted & _content(said)) / needed) if needed else 1.0


def _informativeness(asked: Sequence[str], said: Sequence[str]) -> float:
    new = len(_content(said) - _content(asked))
    return new / (new + 1.5)


def _prose(said: Sequence[str]) -> float:
    """Function words against a fifth of all words; a text of up to three words is too short to tell."""
    if len(said) <= 3:
        return 1.0
    return min(1.0, sum(word in _FUNCTION_WORDS for word in said) / (0.2 * len(said)))


def _echo(asked: Sequence[str], answer: Sequence[str]) -> float:
    """Share of the answer's words that stand in runs of 6 (or as many as the question has, at least 3) copied from the
    question.
    """
    n = min(6, len(asked))
    if n < 3:
        return 0.0
    runs = {tuple(asked[i : i + n]) for i in range(len(asked) - n + 1)}
    copied: set[int] = set()
    for i in range(len(answer) - n + 1):
        if tuple(answer[i : i + n]) in runs:
            copied.update(range(i, i + n))
    return len(copied) / len(answer)


def _agreement(target: Sequence[str], answer: Sequence[str]) -> float:
    """Share of the target's content words (of all its words, if it has no content words) in the answer."""
    wanted = _content(target)
    if wanted:
        return len(wanted & _content(answer)) / len(wanted)
    return len(set(target) & set(answer)) / len(set(target)) if target else 0.0
