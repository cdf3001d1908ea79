"""No spot may be there twice, since a split could learn from one and be scored on the other."""

import hashlib

import numpy as np

from study.errors import InputError

FEW_COUNTS = 100  # two spots with fewer may be the same by chance
FEW_GENES = 20  # as well, where the slides share fewer of their genes


def check_patches(seen, patches, names):
    """InputError where two spots have the same pixels; blank patches may be the same by chance.
    `seen` is empty at first, and remembers the spots.
    """
    for spot, patch in zip(names, patches, strict=True):
        if (patch != patch[0, 0]).any():
            refuse_twin(seen, spot, "pixels", patch.tobytes())


def check_alike_counts(seen, table):
    """As check_patches, of spots that have the same counts of the same genes."""
    genes = "\n".join(table.var_names).encode()
    for spot, content in tell_counts(table):
        refuse_twin(seen, spot, "counts", genes + content)


def tell_counts(table):
    """(spot, its counts as bytes) of the spots whose counts are the same in no other by chance.

    Those are FEW_COUNTS in all, and either all that the spot has or of FEW_GENES genes: of a few
    genes that slides share, two spots may well have the same counts. The matrix holds no zero and
    lies in the order of the genes, as read_spots gives it.
    """
    matrix = table.X
    for number, (spot, total) in enumerate(table.obs["n_counts"].items()):
        row = slice(*matrix.indptr[number : number + 2])
        genes, values = matrix.indices[row], matrix.data[row]
        counted = values.sum()
        if counted >= FEW_COUNTS and (counted == total or len(genes) >= FEW_GENES):
            # Readers of other formats give other types of the same numbers.
            yield spot, genes.astype(np.int64).tobytes() + values.astype(np.float64).tobytes()


def refuse_twin(seen, spot, kind, content):
    """Note in `seen` that a spot has this content; InputError where another spot has it.

    Spots are called as in obs, by their slide and barcode.
    """
    digest = hashlib.blake2b(content, digest_size=16).digest()
    twin = seen.setdefault((kind, digest), spot)
    if twin == spot:
        return
    found = f"the spots {twin} and {spot} have the same {kind}"
    if twin.split("_")[0] == spot.split("_")[0]:
        cause = {"pixels": "their positions or the image", "counts": "a part of the matrix"}[kind]
        raise InputError(f"{found}, and are of one slide: fix {cause}, which is there twice")
    if kind == "counts":
        raise InputError(
            f"{found}, on two slides: give each slide in slides.csv a matrix of its own"
        )
    raise InputError(
        f"a leak: {found}, so a split could learn from one and be scored on the other; is a slide "
        "in slides.csv twice?"
    )
