"""Operators: schema, fake kernel, CPU implementation and autograd of each, one module an operator."""
