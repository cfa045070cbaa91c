"""Files made to do harm, and the process that reads each of them under watch."""
