"""Conversations as text, by the Jinja template that a model file carries."""

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
  """Returns the conversation as the text the model was trained on.

  Args:
    template: Jinja source. It comes with the model file, so it runs in
      Jinja's sandbox and sees nothing but the arguments below.
    messages: Turns, each with a `role` and a `content`.
    add_generation_prompt: Whether the text ends where a reply begins.
    bos_token: Text of the start token, empty if the model has none.
    eos_token: Text of the end token, empty if the model has none.

  Raises:
    ValueError: if a message lacks its role or content, or the template
      refuses the conversation.
    ModuleNotFoundError: if the `demo` extra is not installed.
  """
  for i, message in enumerate(messages):
    for key in ("role", "content"):
      if not isinstance(message.get(key), str):
        raise ValueError(f"messages[{i}]={message!r} needs a text {key!r}.")
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
  """Returns the sandbox, set up as templates written for Hugging Face expect.

  Newlines after a block tag and blanks before one leave no trace.
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
