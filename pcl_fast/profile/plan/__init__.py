"""What a run on several GPUs is expected to take, from measured parts and stated models of the rest."""
