"""The figures that the README quotes, each a script that anyone can run."""
