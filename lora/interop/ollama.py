"""Writes a Modelfile, from which Ollama makes a model that answers as `lora generate` does.

Ollama does not run Jinja. It looks up the template of a GGUF file in a list of known ones; if it is
not listed, Ollama sends the prompt without a template. So a template that only writes text around
each message is translated here into Go's template language. Any other has to be translated by hand.
"""

from __future__ import annotations

from lora.interop.answers import AnswerFormat, Turns

# Greedy decoding. Ollama's defaults sample, and make tokens that occurred before less probable.
AS_GENERATED = {"temperature": 0, "repeat_penalty": 1}


def modelfile(model: str, adapter: str | None, answer: AnswerFormat | None) -> str:
    """Returns the Modelfile of a GGUF model, with a GGUF adapter if one is given.

    model, adapter: paths as the Modelfile has them. Ollama reads them relative to the Modelfile.
    """
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    if answer is None:
        return "\n".join(lines) + "\n"
    template = None if answer.turns is None else go_template(answer.turns)
    if template is None:
        lines += [
            "# The run's chat template could not be translated. If Ollama does not know it from",
            "# the GGUF file, write it here as TEMPLATE, in Go's template language.",
        ]
    else:
        lines.append(f'TEMPLATE """{template}"""')
    system = None if answer.turns is None else answer.turns.system
    if template is not None and system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    for stop in filter(None, (*answer.end_tokens, answer.stop_text)):
        quotes = '"""' if '"' in stop or "\n" in stop else '"'
        lines.append(f"PARAMETER stop {quotes}{stop}{quotes}")
    parameters = {**AS_GENERATED, "num_predict": answer.max_new_tokens}
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"


def go_template(turns: Turns) -> str | None:
    """Returns the template in Go's language; None if a text in it cannot be written there."""
    texts = [turns.head, *(text for pair in turns.around.values() for text in pair)]
    if any("{{" in text or '"""' in text for text in texts):
        return None
    cases = [
        f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ '
        for role, (before, after) in turns.around.items()
    ]
    body = "else ".join(cases)
    return f"{turns.head}{{{{ range .Messages }}}}{{{{ {body}end }}}}{{{{ end }}}}"
