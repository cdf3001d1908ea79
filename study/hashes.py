"""What tells contents apart, by SHA-256: of files, of texts, and seeds of words."""

import functools
import hashlib

WHOLE_BYTES = 16 * 2**20  # of a file, up to which hash_blocks takes all of it
BLOCKS, BLOCK_BYTES = 65, 2**14  # of a larger file, what it takes


def hash_file(path):
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identify_file(path):
    """The first digits of the hash of a file's content."""
    status = path.stat()
    return hash_unchanged(path, status.st_size, status.st_mtime_ns)[:16]


@functools.lru_cache(maxsize=64)
def hash_unchanged(path, size, changed):
    """hash_file, which reads the file again when its size or time of change is another."""
    return hash_file(path)


def hash_blocks(path):
    """SHA-256 of a file's content or, of a large one, of blocks all over it, which is quick."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return hash_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(BLOCKS):
            # The first is the head, and the last the end, where TIFFs keep their tables.
            file.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def seed_of(*words):
    """A seed by the words alone, as seed_of(42, "epoch", 3), whatever ran before."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fingerprint_of(meta_text):
    """What a run holds of the meta.json, as bytes, of the dataset that it was made on."""
    return hashlib.sha256(meta_text).hexdigest()[:16]
