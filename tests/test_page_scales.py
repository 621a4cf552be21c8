"""Which scales the threads of the decode kernel gather."""

import numpy as np
import pytest

from pallas_kernels import page_scales


@pytest.mark.parametrize(
  ("page_size", "chunk"), [(8, 8), (24, 8), (16, 16), (256, 64), (128, 128)]
)
def test_chunks_are_counted_in_the_order_of_the_array(page_size, chunk):
  shape = 5, 3, page_size
  scales = np.arange(np.prod(shape)).reshape(shape)
  chunks = scales.reshape(-1, chunk)
  for page in range(5):
    for head in range(3):
      for row in range(0, page_size, chunk):
        nth = page_scales.chunk_number(page, head, row, shape, chunk)
        expected = scales[page, head, row : row + chunk]
        np.testing.assert_array_equal(chunks[nth], expected)
