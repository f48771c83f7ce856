"""The ggml tensor types as one table.

The ids, block sizes and block bytes are those of ggml.h and of ``gguf.GGML_QUANT_SIZES`` (a test compares the two);
the table stands here because importing the ``gguf`` package takes longer than a small merge.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgmlType:
    """One ggml type: ``block_size`` weights are stored in ``block_bytes`` bytes.

    ``fallback`` is what llama.cpp takes in its place for rows that are not whole blocks.
    """

    id: int
    name: str
    block_size: int
    block_bytes: int
    fallback: str = "F16"

    def row_bytes(self, n_cols: int) -> int:
        """Return the bytes of a row of ``n_cols`` weights; ``n_cols`` is a multiple of ``block_size``."""
        return n_cols // self.block_size * self.block_bytes

    def __str__(self) -> str:
        return self.name


TYPES = {
    row[0]: GgmlType(*row)
    for row in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84, "Q4_0"),
        (11, "Q3_K", 256, 110, "Q4_0"),
        (12, "Q4_K", 256, 144, "Q5_0"),
        (13, "Q5_K", 256, 176, "Q5_1"),
        (14, "Q6_K", 256, 210, "Q8_0"),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66, "IQ4_NL"),
        (17, "IQ2_XS", 256, 74, "IQ4_NL"),
        (18, "IQ3_XXS", 256, 98, "IQ4_NL"),
        (19, "IQ1_S", 256, 50, "IQ4_NL"),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110, "IQ4_NL"),
        (22, "IQ2_S", 256, 82, "IQ4_NL"),
        (23, "IQ4_XS", 256, 136, "IQ4_NL"),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56, "IQ4_NL"),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54, "Q4_0"),
        (35, "TQ2_0", 256, 66, "Q4_0"),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
        (42, "Q2_0", 64, 18, "Q4_0"),
    )
}
BY_NAME = {t.name: t for t in TYPES.values()}

# llama_ftype of llama.h: what general.file_type says of a file whose weights are mostly of one type, or of one mix
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20,
    "Q2_K_S": 21, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28,
    "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "NVFP4": 39,
    "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip
