"""Hiding tokens for a model that fills them in: which ones is a function of a seed and a number."""

from typing import NamedTuple

import numpy as np

from transnormer.data.loader import IGNORED
from transnormer.data.order import hash_key
from transnormer.data.tokenizers.base import Tokenizer, token_lengths


class Masking:
    """Choose the tokens of a sample that a model must predict, and what it sees in their place.

    Of the tokens that stand for text, max(1, round(share * their number)) are chosen, none twice;
    special tokens never are. A chosen one becomes the mask token with probability `mask`, another
    token drawn evenly from those of text with probability `random`, and stays what it is otherwise
    (Devlin et al. 2019, arXiv:1810.04805, section 3.1 and the released code, which fixes the
    number).

    The draws depend on (seed, number of the sample) alone: on no other sample, no order and no
    version of numpy's distributions.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        mask_id: int,
        *,
        share: float,
        mask: float,
        random: float,
        seed: int,
    ) -> None:
        """Keep the rule.

        Args:
            tokenizer: of the samples.
            mask_id: the id that stands for a hidden token.
            share: of the tokens, in (0, 1].
            mask, random: probabilities, at most 1 together.
            seed: another seed, another choice.
        """
        self.mask_id, self.seed = mask_id, seed
        self.share, self.mask, self.random = share, mask, random
        lengths = token_lengths(tokenizer)
        self._of_text = lengths > 0
        self._replacements = np.flatnonzero(self._of_text)

    def apply(self, ids: np.ndarray, number: int, usable: np.ndarray | None = None) -> "Masked":
        """Hide tokens of one sample.

        Args:
            ids: int64 [seq]; not modified.
            number: of the sample.
            usable: bool [seq]; a False token is not chosen. None is all.
        """
        candidates = self._of_text[ids]
        if usable is not None:
            candidates &= usable
        places = np.flatnonzero(candidates)
        labels = np.full_like(ids, IGNORED)
        inputs = ids.copy()
        if not len(places):
            return Masked(inputs, labels)
        count = max(1, round(self.share * len(places)))
        draws = np.random.Philox(key=hash_key(self.seed, number)).random_raw(
            len(places) + 2 * count
        )
        chosen = places[np.argsort(draws[: len(places)], kind="stable")[:count]]
        kinds, others = np.split(draws[len(places) :], 2)
        labels[chosen] = ids[chosen]
        kind = (kinds >> np.uint64(11)) * 2.0**-53
        hidden = kind < self.mask
        inputs[chosen[hidden]] = self.mask_id
        drawn = ~hidden & (kind < self.mask + self.random)
        size = np.uint64(len(self._replacements))
        inputs[chosen[drawn]] = self._replacements[(others[drawn] % size).astype(np.int64)]
        return Masked(inputs, labels)


class Masked(NamedTuple):
    """A sample with hidden tokens: what the model sees, and labels, -100 where nothing is asked."""

    inputs: np.ndarray
    labels: np.ndarray
