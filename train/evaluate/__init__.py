"""What is asked of models and of explanation methods: a file per question."""
