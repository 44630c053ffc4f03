from flexasl.tools.cli import main

main()
