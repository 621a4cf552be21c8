"""Renders conversations with the Jinja template of a model file."""

from collections.abc import Mapping, Sequence
from typing import Any

from paged_jax.extras import import_demo


def render_chat(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  *,
  add_generation_prompt: bool,
  bos_token: str,
  eos_token: str,
) -> str:
  """Returns the conversation as text, in the model's chat format.

  Args:
    template: Jinja source. It comes from a model file, so it runs in Jinja's
      sandbox, with access to the arguments below only.
    messages: Turns, each with a `role` and a `content`, both strings.
    add_generation_prompt: Whether to end the text with the start of a reply.
    bos_token: Text of the start token, empty if the model has none.
    eos_token: Text of the end token, empty if the model has none.

  Raises:
    ValueError: If a message lacks its role or content, or if the template fails
      or refuses the conversation.
    ModuleNotFoundError: If the `demo` extra is not installed.
  """
  for i, message in enumerate(messages):
    for key in ("role", "content"):
      if not isinstance(message.get(key), str):
        raise ValueError(f"messages[{i}]={message!r} needs a string {key!r}.")
  template_error = import_demo("jinja2").TemplateError
  try:
    return (
      _environment()
      .from_string(template)
      .render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=bos_token,
        eos_token=eos_token,
      )
    )
  except template_error as error:
    raise ValueError(f"the chat template failed: {error}") from error


def _environment() -> Any:
  """Returns the sandbox, with the settings that Hugging Face templates expect.

  Newlines after a block tag and blanks before it are removed.
  """
  template_error = import_demo("jinja2").TemplateError

  def raise_exception(message: str):
    raise template_error(message)

  environment = import_demo("jinja2.sandbox").ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols"],
  )
  environment.globals["raise_exception"] = raise_exception
  return environment
