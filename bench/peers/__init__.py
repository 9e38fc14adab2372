"""Other ways to run a ViT on a CPU, each in processes of its own, compared by peers_cpu.py."""
