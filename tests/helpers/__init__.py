"""What several test files share: models, prompts, references and stand-ins."""
