"""Best-fit decreasing: pieces into bins of one capacity, each into the fullest bin that still takes it.

As in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830). Pieces of one length are placed together, so
that the work grows with the pieces' number and with the square of the capacity, and not with their product.
"""

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs pieces, the longest first and equal ones in their order.

    Args:
        lengths: of each piece, between 1 and `capacity`.
        capacity: of each bin.

    Returns:
        The pieces in the order of the bins, and for each bin where its pieces begin in that order, the end of the last
        bin besides.

    Shape:
        lengths and order (pieces,), offsets (bins + 1,).

    Example:
        >>> best_fit(np.array([3, 6, 4, 2]), 7)
        (array([1, 2, 0, 3]), array([0, 1, 3, 4]))
    """
    by_length = np.argsort(-lengths, kind="stable")
    numbers = np.bincount(lengths, minlength=capacity + 1)
    bin_of = np.empty(len(lengths), dtype=np.int64)
    waiting: dict[int, list[np.ndarray]] = {}  # from what is left in a bin to the bins with so much left
    bins = done = 0
    for length in range(capacity, 0, -1):
        left = int(numbers[length])
        while left:
            room = min((rest for rest in waiting if rest >= length), default=None)
            if room is None:
                room, each = capacity, capacity // length
                count = -(-left // each)
                chosen, bins = np.arange(bins, bins + count), bins + count
            else:
                each = room // length
                chosen = np.concatenate(waiting.pop(room))
                if (count := -(-left // each)) < len(chosen):
                    waiting[room], chosen = [chosen[count:]], chosen[:count]
            # Each bin takes all that it can before the next one does.
            placed = min(left, each * len(chosen))
            bin_of[by_length[done : done + placed]] = np.repeat(chosen, each)[:placed]
            full, some = divmod(placed, each)
            for part, taken in ((chosen[:full], each), (chosen[full : full + 1], some)):
                if len(part) and taken and (rest := room - taken * length):
                    waiting.setdefault(rest, []).append(part)
            done, left = done + placed, left - placed
    order = np.argsort(bin_of[by_length], kind="stable")
    return by_length[order], np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=bins))])
