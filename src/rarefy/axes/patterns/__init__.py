"""One file for each pattern; `rarefy.axes.pattern` imports them all."""
