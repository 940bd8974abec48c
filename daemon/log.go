package daemon

import (
	"os"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"
)

// NewLog returns a logger that writes to f: for people on a terminal, JSON otherwise, unless l says which.
func NewLog(l Log, f *os.File) *zap.Logger {
	people := l.Format == FormatConsole || l.Format == FormatAuto && term.IsTerminal(int(f.Fd()))
	e := zap.NewProductionEncoderConfig()
	e.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	e.TimeKey = "time"
	encoder := zapcore.NewJSONEncoder(e)
	if people {
		e.EncodeTime = zapcore.TimeEncoderOfLayout(time.TimeOnly + ".000")
		e.EncodeLevel = zapcore.CapitalLevelEncoder
		if term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" {
			e.EncodeLevel = zapcore.CapitalColorLevelEncoder
		}
		e.ConsoleSeparator = "  "
		encoder = zapcore.NewConsoleEncoder(e)
	}
	// A fault of the program is logged with its stack where it is caught; everything else says what it was doing.
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(f), l.Level.zap()))
}
