"""The rules as steps of a datatrove pipeline: each looks at the items that are still in."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from datatrove.pipeline.base import PipelineStep

from transnormer.clean.config import CleanConfig, RulesConfig
from transnormer.clean.item import QUARANTINED, Item
from transnormer.clean.rules import language, lines, pii, quality
from transnormer.clean.rules import text as signs
from transnormer.clean.rules.markup import restore, shelter
from transnormer.clean.rules.quality import Quality

_Edit = Callable[[str], tuple[str, int]]


class ItemStep(PipelineStep):
    """A step that changes or drops one item at a time."""

    type = "clean"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Item]:
        """Apply the step to every item that is in the corpus; the others pass."""
        for item in data:
            if item.out is None:
                with self.track_time():
                    self.apply(item)
            yield item

    @abstractmethod
    def apply(self, item: Item) -> None:
        """Change the item in place."""

    def edit(self, item: Item, name: str, rule: _Edit) -> bool:
        """Apply a rule to the text and count what it did; returns whether it did anything."""
        text, times = rule(item.text)
        if text == item.text:
            return False
        item.text = text
        item.edits[name] += max(1, times)
        return True


class StopAtBadInput(ItemStep):
    """Ends the run at the first input that cannot be read."""

    name = "bad input"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Item]:
        """Raise ValueError that names the input."""
        for item in data:
            if item.out == QUARANTINED:
                raise ValueError(
                    f"{item.id}: {item.why['reason']}; expected input that can be read; mend it, "
                    "or set on_bad_input = 'quarantine'"
                )
            yield item

    def apply(self, item: Item) -> None:
        """Nothing: items are looked at as they pass."""


class MaskPii(ItemStep):
    """Masks personal data, and remembers where it stood in the text as it was read."""

    name = "pii"

    def __init__(self, *, again: bool = False) -> None:
        """again: look once more, where a page or its encoding hid what is there now."""
        super().__init__()
        self._again = again

    def apply(self, item: Item) -> None:
        """Mask what is found."""
        if self._again and not (item.edits["html"] or item.edits["encoding"] or item.edits["tags"]):
            return
        spans = pii.find_pii(item.text)
        if not spans:
            return
        item.text = pii.mask(item.text, spans)
        item.edits["pii"] += len(spans)
        if not self._again:
            item.pii = spans


class RepairText(ItemStep):
    """Encoding, characters that show nothing, pages of HTML."""

    name = "repair"

    def __init__(self, rules: RulesConfig, quality: Quality) -> None:
        super().__init__()
        self._rules, self._quality = rules, quality

    def apply(self, item: Item) -> None:
        """Repair, in this order: the parser of pages needs the right characters."""
        if self._rules.encoding:
            self._repair(item)
        if item.out is not None:
            return
        if self._rules.controls:
            self.edit(item, "controls", signs.remove_controls)
        if self._rules.html:
            from transnormer.clean.rules import html

            if html.is_page(item.text):
                self.edit(item, "html", lambda text: (html.page_text(text), 1))

    def _repair(self, item: Item) -> None:
        # Two looks, the cheap one first: most texts pass it.
        if not signs.suspect(item.text) or not signs.is_garbled(item.text):
            return
        self.edit(item, "encoding", signs.repair_encoding)
        limit = self._quality.max_garbled
        if limit is not None and signs.garbled(item.text) > limit:
            item.drop("rules", "max_garbled")


class EditText(ItemStep):
    """Lines and signs; code, formulas and Markdown stay as they are."""

    name = "edit"

    def __init__(self, rules: RulesConfig, quality: Quality) -> None:
        super().__init__()
        self._rules, self._quality = rules, quality

    def apply(self, item: Item) -> None:
        """Edit lines first, so that what is left of a removed line disturbs no rule."""
        rules, limit = self._rules, self._quality.max_url_share
        removed = rules.boilerplate or rules.watermarks
        if removed:
            text, rows, marks = lines.remove_lines(
                item.text, navigation=rules.boilerplate, watermarks=rules.watermarks
            )
            removed = rows + marks > 0
            item.text = text
            item.edits.update({"boilerplate": rows, "watermarks": marks} if removed else {})
        sign_rules: tuple[tuple[bool, str, _Edit], ...] = (
            (rules.tags, "tags", signs.remove_tags),
            (rules.urls, "urls", signs.remove_urls),
            (rules.punctuation, "punctuation", signs.collapse_punctuation),
            (rules.numbers, "numbers", signs.narrow),
            (rules.numbers, "numbers", signs.plain_numbers),
        )
        item.text, kept = shelter(item.text)
        if limit is not None and signs.url_share(item.text) > limit:
            item.text = restore(item.text, kept)
            item.drop("rules", "max_url_share")
            return
        for wanted, name, rule in sign_rules:
            if wanted:
                removed |= self.edit(item, name, rule)
        item.text = restore(item.text, kept)
        if removed:
            item.text = signs.tidy_lines(item.text)


class DropByLanguage(ItemStep):
    """Names the language, and drops those that are not wanted."""

    name = "language"

    def __init__(self, languages: tuple[str, ...]) -> None:
        super().__init__()
        self._languages = languages

    def apply(self, item: Item) -> None:
        """Set item.language."""
        item.language = language.identify(item.text)
        if self._languages and item.language not in self._languages:
            item.drop("rules", "language", language=item.language)


class DropByQuality(ItemStep):
    """Drops whole documents by the thresholds."""

    name = "quality"

    def __init__(self, limits: Quality) -> None:
        super().__init__()
        self._limits = limits

    def apply(self, item: Item) -> None:
        """Drop with the name of the threshold as the reason."""
        item.measures = quality.Measures(item.text)
        reason = quality.why_drop(item.measures, self._limits, item.language)
        if reason is not None:
            item.drop("rules", reason)


def rule_steps(config: CleanConfig) -> list[ItemStep]:
    """The steps of a run's rules, in the order in which they are applied."""
    steps: list[ItemStep] = []
    if config.on_bad_input == "stop":
        steps.append(StopAtBadInput())
    if config.rules.pii:
        steps.append(MaskPii())
    steps.append(RepairText(config.rules, config.quality))
    steps.append(EditText(config.rules, config.quality))
    if config.rules.pii:
        steps.append(MaskPii(again=True))
    steps.append(DropByLanguage(config.rules.languages))
    steps.append(DropByQuality(config.quality))
    return steps
