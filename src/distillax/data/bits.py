"""Integers as bits, most significant first: plain, in unary, Rice coded, and exponential Golomb coded."""

import numpy as np

_PARAMETER_BITS, _DIGITS = 4, 32
_WORD = 8  # bytes
_LIKELY = 4  # bits of a number in unary, at most, on average of many


class Writer:
    """Numbers, int64 and not negative, one after the other as bits."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def flags(self, values: np.ndarray) -> None:
        """Of one bit each."""
        self._parts.append(values.astype(np.uint8))

    def write(self, values: np.ndarray, widths: np.ndarray) -> None:
        """The low bits of each, as many as its width says."""
        size = -(-int(widths.max(initial=1)) // 8)  # bytes that hold the widest
        low = values.astype(">u8")[:, None].view(np.uint8)[:, -size:]
        self._parts.append(np.unpackbits(low, 1)[np.arange(8 * size) >= 8 * size - widths[:, None]])

    def unary(self, values: np.ndarray) -> None:
        """As many zeros for each, and a 1."""
        ones = np.zeros(len(values) + int(values.sum()), np.uint8)
        ones[np.cumsum(values + 1) - 1] = 1
        self._parts.append(ones)

    def rice(self, values: np.ndarray, low: np.ndarray) -> None:
        """What is beyond the low bits of each, in unary, and then these."""
        self.unary(values >> low)
        self.write(values, low)

    def golomb(self, values: np.ndarray) -> None:
        """Exponential Golomb: a parameter l, and each with 2^l added, by how many binary digits it has beyond
        l + 1, in unary, and then all but the first. The l is the best there is."""

        tried = np.arange(1 << _PARAMETER_BITS)
        sizes = 2 * digits(values + (1 << tried)[:, None]).sum(1) - tried * len(values)
        low = int(sizes.argmin())
        self.write(np.array([low]), np.array([_PARAMETER_BITS]))
        values = values + (1 << low)
        more = digits(values) - 1 - low
        self.unary(more)
        self.write(values, more + low)

    def bytes(self) -> bytes:
        return np.packbits(np.concatenate(self._parts)).tobytes()


class Reader:
    """What a `Writer` wrote, from uint8[...]. Raises ValueError beyond their end."""

    def __init__(self, data: np.ndarray) -> None:
        self._bits, self._at = np.unpackbits(data).view(bool), 0
        padded = np.concatenate([data, np.zeros(_WORD, np.uint8)])
        # The eight bytes from each byte on: gathering those of each number would take ten times as long.
        self._words = np.ndarray(len(data) + 1, ">u8", padded, strides=(1,)).astype(np.uint64)

    def flags(self, number: int) -> np.ndarray:
        """bool[number], of numbers of one bit."""
        return self._bits[self._skip(number) : self._at]

    def read(self, widths: np.ndarray) -> np.ndarray:
        """From the eight bytes in which each number begins: so it has 57 bits at most. `widths` int64."""
        ends = widths.cumsum()
        starts = self._skip(int(ends[-1]) if len(ends) else 0) + ends - widths
        words = self._words.take(starts >> 3) << (starts & 7).view(np.uint64)
        return (words >> (8 * _WORD - widths).view(np.uint64)).view(np.int64)

    def _skip(self, number: int) -> int:
        """Where the next bits begin, so many of which are taken."""
        start = self._at
        self._at += number
        if self._at > len(self._bits):
            raise ValueError("too short")
        return start

    def unary(self, number: int) -> np.ndarray:
        most = _LIKELY * number
        while len(ones := self._bits[self._at : self._at + most].nonzero()[0]) < number:
            if self._at + most >= len(self._bits):
                raise ValueError("too short")
            most = len(self._bits)
        ones = ones[:number]
        self._skip(int(ones[-1]) + 1 if number else 0)
        zeros = ones.copy()
        zeros[1:] -= ones[:-1] + 1
        return zeros

    def rice(self, low: np.ndarray) -> np.ndarray:
        high = self.unary(len(low))
        return high << low | self.read(low)

    def golomb(self, number: int) -> np.ndarray:
        at = self._skip(_PARAMETER_BITS)
        low = int(self._words[at >> 3]) >> 8 * _WORD - _PARAMETER_BITS - (at & 7) & (1 << _PARAMETER_BITS) - 1
        more = self.unary(number)
        if number and more.max() > _DIGITS:
            raise ValueError("no number is as large")
        return self.read(more + low) + (((1 << more) - 1) << low)

    def end(self) -> None:
        rest = self._bits[self._at :]
        if len(rest) >= 8 or rest.any():
            raise ValueError("too long")


def digits(values: np.ndarray) -> np.ndarray:
    """Binary digits of integers >= 0 that a float64 holds."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)
