from judges.report import main

main()
