"""From the files that people have to token ids."""
