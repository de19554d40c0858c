"""The loop that Distill and Finetune share, and what it reads."""
