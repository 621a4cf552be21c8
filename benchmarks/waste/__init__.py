"""How much KV memory pages waste and save."""
