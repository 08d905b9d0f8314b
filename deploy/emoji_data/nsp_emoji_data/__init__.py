"""The embedded emoji set of nsp, as a package of its own: `emoji.tar` lies beside this file."""
