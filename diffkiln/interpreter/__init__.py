"""How programs are run: operators in the form in which they cannot reach outside of their tensors."""
