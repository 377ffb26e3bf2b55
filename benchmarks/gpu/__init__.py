"""`make gpu`: everything that is to be proven on a machine with a GPU, in three stages, written to need one try."""
