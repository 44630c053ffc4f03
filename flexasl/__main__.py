from flexasl.cli import main

main()
