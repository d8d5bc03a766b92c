"""Makes pruners: stage 1 marks in a dense forward what matters, stage 2 trains pruners to see it in hidden states."""
