"""`python -m shrp_hf.cli`, the same as `shrp-hf`."""

from shrp_hf.cli import main

main()
