"""How fast training is: the step against the straightforward implementation, in one run."""
