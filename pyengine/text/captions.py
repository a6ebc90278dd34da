"""Cleaning of prompts, as a bundle asks for it. The rules "captions" are those of DeepFloyd's, PixArt's and Open-Sora's training.

Lower case; no addresses, tags, nicknames, ids, file names or CJK; one kind of dash and of quote.
"""

from __future__ import annotations

import html
import importlib
import re
import warnings
from collections.abc import Callable
from types import ModuleType
from urllib.parse import unquote_plus

from pyengine.bundle.manifest import Cleaning
from pyengine.errors import BackendUnavailable, PromptError

__all__ = ["clean_caption", "cleaned_prompt"]

_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
# In this order; each pattern is replaced by the text beside it.
_BEFORE_MARKUP = [
    ("<person>", "person"),
    (rf"\b((?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
    (rf"\b((?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
]
_AFTER_MARKUP = [
    (r"@[\w\d]+\b", ""),
    ("[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+", ""),
    (
        "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILES})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    ("[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~)(\\]\\[}{|\\\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_AFTER_REPAIR = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
]
_JOINS = 3  # more dashes and underscores than this, and they stand for spaces


def cleaned_prompt(prompt: str, cleaning: Cleaning | None) -> str:
    """What the text encoder is given. Raises what `clean_caption` raises."""
    if cleaning is None:
        return prompt
    if cleaning.suffix and not (cleaning.unless and cleaning.unless in prompt):
        prompt += cleaning.suffix
    rules: dict[str, Callable[[str], str]] = {"captions": clean_caption, "whitespace": clean_whitespace}
    for _ in range(cleaning.passes):
        prompt = rules.get(cleaning.rules, str)(prompt)
    return prompt


def clean_whitespace(text: str) -> str:
    """Broken characters repaired, markup's characters as themselves, one blank for every run of white space. Case and marks stay (Wan).

    Raises BackendUnavailable without `ftfy`.
    """
    text = html.unescape(html.unescape(_library("ftfy").fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def clean_caption(caption: str) -> str:
    """One pass. Raises BackendUnavailable without the packages of the extra `opensora`, PromptError for broken markup."""
    text = _replaced(unquote_plus(caption).strip().lower(), _BEFORE_MARKUP)
    text = _replaced(_text_of(text), _AFTER_MARKUP)
    if len(re.findall("[-_]", text)) > _JOINS:
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(_library("ftfy").fix_text(text))).strip()
    return _replaced(text, _AFTER_REPAIR).strip()


def _replaced(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _text_of(markup: str) -> str:
    """Text between tags. What broken markup becomes is a matter of the parser, so it is the one that training used."""
    soup = _library("bs4")
    with warnings.catch_warnings():
        # One that reads as a file name or an address.
        warnings.simplefilter("ignore", soup.MarkupResemblesLocatorWarning)
        try:
            return str(soup.BeautifulSoup(markup, features="html.parser").text)
        except soup.ParserRejectedMarkup as error:
            raise PromptError(
                f"expected a prompt of text but got markup that cannot be read ({markup[:40]!r}); leave out '<!['"
            ) from error


def _library(name: str) -> ModuleType:
    """Imported when a prompt comes: other families run without."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable(
            f"cleaning a prompt needs the package {error.name}: pip install 'pyengine-video[opensora]'"
        ) from error
