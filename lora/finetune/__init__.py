"""The application: the `lora` command and what it runs."""
