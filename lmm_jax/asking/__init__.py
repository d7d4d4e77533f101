"""What `lmm generate` and `lmm chat` are made of: files of questions and of answers, and the terminal."""
