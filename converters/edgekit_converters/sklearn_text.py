"""Text vectorizers as ONNX computes them: the same tokens as Python's, or a refusal.

skl2onnx takes `[a-zA-Z0-9_]+` for scikit-learn's usual `(?u)\\b\\w\\w+\\b`: other tokens for every
accent and every one-letter word. ONNX Runtime's Tokenizer searches with RE2, whose `\\w` and `\\b`
know ASCII only. So the token pattern becomes a class of the very characters that Python's `re` puts
into it, repeated: maximal runs of a class need no `\\b`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from edgekit.errors import ModelError

__all__ = ["EXAMPLES", "LOWERCASE_NOTE", "prepare", "token_expression"]

#: lower case as Python's but for İ and a final Σ. skl2onnx's default, en_US.UTF-8, is absent from
#: most containers and boards, and ONNX Runtime then refuses the model.
_LOCALE = "C.UTF-8"
LOWERCASE_NOTE = (
    "texts with İ (U+0130) or Σ at a word's end are put into lower case otherwise than Python does "
    "it; the device needs the locale C.UTF-8 (Linux and Android have it)"
)
#: where tokenizers differ
EXAMPLES = (
    "", " ", "a", "I", "#", "##", "a b c d e", "don't_do-it", "naïve café POKÉMON", "½ ²³ ٣٤ Ⅻ",
    "日本語テキスト", "\U0001d407\U0001d41e\U0001d425\U0001d425\U0001d428 world",
    "tab\tsep\r\nline\n\nline", "\U0001f44d\U0001f3fd nice", "x" * 3000, "non\u00a0breaking",
    "zero\u200bwidth", "ÄÖÜ ß ẞ", "Привет МИР", "a.b.c@d.example, 1,000.5!", "_ __ ___ a_",
    "नमस्ते",
)  # fmt: skip

#: flags, word boundaries around it or none, and a class that is repeated
_PATTERN = re.compile(
    r"(\(\?[uU]\))?(?P<start>\\b)?"
    r"(?P<body>(?P<cls>\\[wdS]|\[(?:\\.|[^\]\\])+\])(?P=cls)*)(\+|\{(?P<least>\d+),\})"
    r"(?P<end>\\b)?"
)


def prepare(vectorizer: Any) -> dict[str, Any]:
    """Make a copied CountVectorizer or TfidfVectorizer ready for skl2onnx; its options for it.

    Raises:
        ModelError: ONNX cannot compute what it does.
    """
    name = type(vectorizer).__name__
    reason = next(_obstacles(vectorizer), None)
    if reason is not None:
        raise ModelError(f"{name}: {reason}")
    options = {"tokenexp": token_expression(vectorizer.token_pattern, name), "locale": _LOCALE}
    # skl2onnx guesses where n-grams are to be split, and takes `new york` for one token where
    # `new` alone is rare. The tokens of these patterns hold no space, so there is nothing to guess.
    low, high = vectorizer.ngram_range
    words = {}
    for term, index in vectorizer.vocabulary_.items():
        parts = tuple(term.split(" "))
        words[parts if low <= len(parts) <= high and all(parts) else (term,)] = index
    vectorizer.vocabulary_ = words
    return options


def _obstacles(vectorizer: Any) -> Iterator[str]:
    if vectorizer.analyzer != "word":
        yield (
            f"analyzer={vectorizer.analyzer!r} has no ONNX operator (it joins runs of white space "
            "first); fit it with analyzer='word'"
        )
    for name in ("preprocessor", "tokenizer"):
        if getattr(vectorizer, name) is not None:
            yield f"{name} is a Python function; fit it with token_pattern instead"
    if vectorizer.strip_accents is not None:
        yield "strip_accents has no ONNX operator; strip them before, or fit it without"
    if vectorizer.stop_words is not None and vectorizer.ngram_range[1] > 1:
        yield (
            "stop words are taken out before n-grams are made, which ONNX cannot; fit it without "
            "stop_words or with ngram_range=(1, 1)"
        )


def token_expression(pattern: str, name: str = "the vectorizer") -> str:
    """An RE2 expression whose longest matches are the tokens `re.findall(pattern, text)` finds.

    Raises:
        ModelError: the pattern is not a run of characters of one class.
    """
    found = _PATTERN.fullmatch(pattern)
    # A run of word characters begins and ends where words do; a run of others need not.
    bounds = bool(found) and (bool(found["start"]), bool(found["end"]))  # type: ignore[index]
    if found is None or not (
        bounds == (False, False) or (bounds == (True, True) and found["cls"] == r"\w")
    ):
        raise ModelError(
            f"{name}: token_pattern={pattern!r} cannot be told to ONNX Runtime; it can be a run of "
            r"one class of characters, such as (?u)\b\w\w+\b, \w+ or [a-z]{3,}"
        )
    cls = found["cls"]
    least = len(found["body"]) // len(cls) - 1 + int(found["least"] or 1)
    spans = list(_spans(cls))
    if least < 1 or not spans or re.fullmatch(cls, " "):
        raise ModelError(
            f"{name}: token_pattern={pattern!r} finds empty tokens or ones with spaces"
        )
    listed = "".join(f"\\x{{{a:x}}}-\\x{{{b:x}}}" for a, b in spans)
    return f"[{listed}]{{{least},}}"


def _spans(cls: str) -> Iterator[tuple[int, int]]:
    """The ranges of code points that Python's `re` puts into a class; no surrogates (UTF-8 has
    none), no NUL."""
    for first, end in ((1, 0xD800), (0xE000, 0x110000)):
        every = "".join(map(chr, range(first, end)))
        for run in re.finditer(f"{cls}+", every):
            yield first + run.start(), first + run.end() - 1
