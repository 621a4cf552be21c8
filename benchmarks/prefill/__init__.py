"""How fast a model reads prompts on a GPU."""
