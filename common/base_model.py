"""The base model of every command that is not told another; by itself, because the imports of the sections take a second."""

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
