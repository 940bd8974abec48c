package bed

// Serving returns how many connections have a goroutine that serves them.
func (p *Proxy) Serving() int { return len(p.slots) }
