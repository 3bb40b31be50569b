"""`python -m thawline.cluster.cli`: the command line, where no script is installed."""

from thawline.cluster.cli.main import main

main()
