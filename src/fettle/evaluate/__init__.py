"""What a written model costs and what was lost: measured on its files, reloaded, against the original."""
