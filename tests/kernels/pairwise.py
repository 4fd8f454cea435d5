"""Pairwise covering: few combinations, and every pair of values of any two axes in at least one of them."""
import itertools


def pairwise(*axes):
    """A list of tuples, one value from each axis; all pairs of values of any two axes occur. Greedy, always the same list.

    Values may be equal or unhashable; position counts. pairwise((1, 2), "ab", (0, 1)) has 4 tuples, where the product has 8.
    """
    wanted = {(i, a, j, b) for i, j in itertools.combinations(range(len(axes)), 2)
              for a in range(len(axes[i])) for b in range(len(axes[j]))}
    chosen = []
    while wanted:
        i, a, j, b = min(wanted)
        pick = {i: a, j: b}
        for axis in range(len(axes)):       # the other axes: whichever value serves most of the pairs still wanted
            if axis not in pick:
                def served(value):
                    return sum(((k, pick[k], axis, value) if k < axis else (axis, value, k, pick[k])) in wanted for k in pick)
                pick[axis] = max(range(len(axes[axis])), key=lambda value: (served(value), -value))
        wanted -= {(k, pick[k], m, pick[m]) for k, m in itertools.combinations(range(len(axes)), 2)}
        chosen.append(tuple(axes[axis][pick[axis]] for axis in range(len(axes))))
    return chosen
