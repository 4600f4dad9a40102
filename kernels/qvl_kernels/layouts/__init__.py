"""How packed weights are laid out in memory, and the conversion from GPTQ and back. Needs no Triton."""
