"""A real sentence encoder, MiniLM, pruned in one shot and by distillation, judged by what it retrieves and how fast."""
