"""vlmflow enriches an image catalog with vision-language models."""
