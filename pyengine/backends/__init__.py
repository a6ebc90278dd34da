"""Graph compilers behind one small protocol; each is imported when it is asked for."""
