"""Figures of compiled programs, from compilers that need no accelerator: what CI can check."""
