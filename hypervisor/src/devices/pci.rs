//! PCI configuration mechanism #1 (PCI Local Bus 3.0, section 3.2.2.3.2) with a host bridge at 00:00.0.
//!
//! Functions register themselves with a slot; a function is 256 bytes of configuration space that it answers for.

/// A PCI function's configuration space.
pub trait Function: Send {
    /// Reads `data.len()` bytes at `offset`.
    fn config_read(&mut self, offset: u8, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn config_write(&mut self, offset: u8, data: &[u8]);
}

/// The bridge between CPU and bus 0: an i440FX by name, without any of its registers.
struct HostBridge;

impl Function for HostBridge {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        const HEAD: [u8; 16] = [0x86, 0x80, 0x37, 0x12, 0, 0, 0, 0, 2, 0, 0, 6, 0, 0, 0, 0];
        for (n, d) in data.iter_mut().enumerate() {
            *d = HEAD.get(usize::from(offset) + n).copied().unwrap_or(0);
        }
    }
    fn config_write(&mut self, _offset: u8, _data: &[u8]) {}
}

/// Bus 0 and its configuration ports.
pub struct PciBus {
    address: u32,
    /// By device number and function.
    functions: Vec<(u8, u8, Box<dyn Function>)>,
}

impl Default for PciBus {
    fn default() -> Self {
        Self { address: 0, functions: vec![(0, 0, Box::new(HostBridge))] }
    }
}

impl PciBus {
    /// Puts a function on bus 0.
    pub fn add(&mut self, device: u8, function: u8, f: Box<dyn Function>) {
        self.functions.push((device & 31, function & 7, f));
    }

    /// The function that CONFIG_ADDRESS selects.
    fn selected(&mut self) -> Option<&mut (dyn Function + 'static)> {
        let a = self.address;
        if a >> 31 == 0 || a >> 16 & 0xff != 0 {
            return None;
        }
        let (dev, fun) = ((a >> 11 & 31) as u8, (a >> 8 & 7) as u8);
        self.functions.iter_mut().find(|f| f.0 == dev && f.1 == fun).map(|f| &mut *f.2)
    }

    /// Reads a port from 0xcf8 to 0xcff.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port < 0xcfc {
            if port == 0xcf8 && data.len() == 4 {
                data.copy_from_slice(&self.address.to_le_bytes());
            }
            return;
        }
        let at = port - 0xcfc;
        if usize::from(at) + data.len() > 4 {
            return;
        }
        let offset = (self.address & 0xfc) as u8 + at as u8;
        if let Some(f) = self.selected() {
            f.config_read(offset, data);
        }
    }

    /// Writes a port from 0xcf8 to 0xcff.
    pub fn write(&mut self, port: u16, data: &[u8]) {
        if port < 0xcfc {
            if port == 0xcf8
                && let Ok(v) = data.try_into()
            {
                self.address = u32::from_le_bytes(v) & 0x80ff_fffc;
            }
            return;
        }
        let at = port - 0xcfc;
        if usize::from(at) + data.len() > 4 {
            return;
        }
        let offset = (self.address & 0xfc) as u8 + at as u8;
        if let Some(f) = self.selected() {
            f.config_write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(bus: &mut PciBus, dev: u32) -> u32 {
        bus.write(0xcf8, &(0x8000_0000 | dev << 11).to_le_bytes());
        let mut d = [0; 4];
        bus.read(0xcfc, &mut d);
        u32::from_le_bytes(d)
    }

    #[test]
    fn host_bridge_and_nothing_else() {
        let mut bus = PciBus::default();
        assert_eq!(id(&mut bus, 0), 0x1237_8086);
        assert_eq!(id(&mut bus, 1), u32::MAX);
        bus.write(0xcf8, &0x8000_0008_u32.to_le_bytes());
        let mut class = [0; 2];
        bus.read(0xcfe, &mut class);
        assert_eq!(class, [0, 6]);
    }
}
