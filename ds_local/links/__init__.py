"""Between stages: messages, how small and by which way they travel, words off the step path."""
