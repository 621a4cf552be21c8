import dataclasses
import re

import numpy as np
import pytest
import tiny_llama

from paged_jax.models import llama


@pytest.mark.parametrize(
  ("changes", "name", "count"),
  [
    ({"tie_word_embeddings": False}, "lm_head.weight", 1),
    ({"num_layers": 3}, "model.layers.2.input_layernorm.weight", 9),
  ],
)
def test_a_missing_weight_is_named_with_the_shape_that_asks_for_it(
  changes, name, count
):
  config = dataclasses.replace(tiny_llama.CONFIG, **changes)
  with pytest.raises(ValueError, match=re.escape(repr(name))) as caught:
    llama.from_weights(config, tiny_llama.weights())
  message = str(caught.value)
  assert f"({count} of " in message
  for field, value in changes.items():
    assert f"{field}={value}" in message


def test_weights_of_another_shape_are_named():
  name = "model.layers.1.self_attn.k_proj.weight"
  wrong = {name: np.zeros((8, 32), np.float32)}
  with pytest.raises(ValueError, match=re.escape(name)):
    llama.from_weights(tiny_llama.CONFIG, tiny_llama.weights() | wrong)
